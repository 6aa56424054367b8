"""What travels in a sync: `landing` and `engine_side` say where tensors land in an engine's workers, `route` lays out the bytes
of each worker, `packing` packs and proves them, and `delta` keeps only what changed since the last version.

This folder knows neither the two ends of a sync nor its transports.
"""
