"""What `mbridge-rl doctor` knows: which packages and which parts of a machine this library needs, and what to do where one is
missing or too small.

    facts.py           what was found on a machine, as plain data; tests write it down themselves
    probe.py           collects the facts of this machine
    requirements.py    the bounds of this library's own metadata, and the versions that its tests ran with
    findings.py        one finding: what was found, whether it is right, and what to do
    packages.py        findings about Python and installed packages
    machine.py         findings about shared memory, limits, the network and GPUs
    transports.py      which transports of weights can work on this machine
    examination.py     all of them together

Nothing here imports torch, Megatron-core, Transformers or vLLM before the probe does: a broken installation of one of them is
what this command has to report.
"""
