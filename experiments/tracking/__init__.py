"""The mirror of the store in MLflow."""
