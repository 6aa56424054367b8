"""The sending end of a sync: the engines as rank 0 calls them, the meeting of trainer and engines, engines that join later, the
packing of a rank's weights, and retries. Imports `payload`, `transports` and `record`.
"""
