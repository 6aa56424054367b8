"""The weight store: memory or files where a trainer puts whole versions and engines read them when they like. `weight_store` is
the class; the other files are its slots, its images, and the locks that say whose a store is. Imports `distributed` and `core`.
"""
