"""The receiving end of a sync in an engine's worker: `update` receives one version and writes it, `serving_state` says which
version is served. Nothing here knows vLLM. This folder imports `payload`, `transports`, `record` and `store`.
"""
