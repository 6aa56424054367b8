"""What runs in each vLLM worker: `backend` is the weight-transfer backend, `tracer` runs the model's own loader on tensors
without data, and `receiver` and `loading` open the model so that its parameters can be written. This folder imports
`sync.worker` and `sync.payload`, which know no vLLM.
"""
