"""What `peft_reft.run` puts on PYTHONPATH, for the Python processes that programs start."""
