"""The sending end of a sync: the engines as rank 0 drives them, how they join, what a rank packs, and retries. Imports
`payload`, `transports` and `record`.
"""
