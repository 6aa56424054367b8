"""The kinds of vLLM engines that a trainer and its user call: in this process, in a child process, in a Ray actor, an
`AsyncLLM`, a server. vLLM itself is imported only when an engine is started. Imports `worker` and `lora` beside it.
"""
