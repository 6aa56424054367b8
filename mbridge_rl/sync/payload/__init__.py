"""What travels in a sync: where tensors land in an engine's workers, the route that packs them, the packed bytes, and the
changes since the last version. Imports `distributed` and what is below it; knows neither the two ends nor the transports.
"""
