"""Train mHC mixture-of-experts models with overlapped pipeline parallelism."""
