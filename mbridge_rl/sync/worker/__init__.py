"""The receiving end of a sync in an engine's worker, without anything of vLLM: an update on its way in, and which version is
served. Imports `payload`, `transports`, `record` and the weight store.
"""
