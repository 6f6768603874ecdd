"""What `infra/local_stack.py` starts on one machine: an S3 server, an MLflow server with users, and a small Ray."""
