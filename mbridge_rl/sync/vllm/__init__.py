"""The vLLM end of a weight sync. Importing this package imports no vLLM; its modules do."""
