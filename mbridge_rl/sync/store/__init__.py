"""The weight store: memory or files in which a trainer puts complete versions, and from which engines read them at any time.
`weight_store` has the class; the other files have its slots, its images, and the locks of its writers. Imports `distributed`
and `core`.
"""
