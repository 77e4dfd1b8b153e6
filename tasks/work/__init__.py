"""How the job of each stage is done, in a worker process."""
