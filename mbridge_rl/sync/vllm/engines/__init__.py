"""The kinds of vLLM engines, as a trainer and its user call them: in this process, in a child process, in a Ray actor, an
`AsyncLLM`, a server. vLLM itself is imported only where an engine is started. This folder imports `worker` and `lora` beside
it.
"""
