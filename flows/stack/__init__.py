"""The local stack: Prefect, MLflow, an S3 server and a worker on loopback, for one person and one machine."""
