"""The receiving end of a sync in an engine worker, without anything of vLLM: it receives an update and knows which version is
served. Imports `payload`, `transports`, `record` and the weight store.
"""
