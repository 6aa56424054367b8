"""The sending end of a sync: `meeting` agrees with the engines on one plan, `engines` are the engines as rank 0 calls them,
`joining` lets one join later, `packer` and `delta_sender` pack what a rank sends, and `retries` tries again. This folder
imports `payload`, `store`, `transports` and `record`.
"""
