"""Everything that differs between the releases of Megatron-core that this library works with, and nothing else.

No other module asks which release is running, tries an import of Megatron, or asks one of Megatron's objects what it has
(`tests/harness/test_version_rooms.py` checks it). A difference is found by the feature itself where that is possible, and each
names the release that brought it. The names that rules, plans, digests and checkpoints use are those of release 0.16; `names`
translates the others, in both directions, so that nothing that is stored or compared depends on the release.

    release.py        which releases are known to work, and what happens with another
    names.py          parameters and modules that were renamed
    layer_specs.py    the layer specs of attention and MLPs
    hybrid.py         models of Mamba and attention layers
    batches.py        packed sequences and context parallelism
    groups.py         the process groups that a model was built with
    checkpoints.py    Megatron's distributed checkpoints
    config.py         fields of Megatron's configs that not every release has, and those that this library refuses
    cpu.py            what Megatron needs on a machine without CUDA
"""
