"""The code that runs in each vLLM worker: the weight-transfer backend, the trace of the model's own loader, and the writing of
its parameters. Imports the generic `sync.worker` and `sync.payload`.
"""
