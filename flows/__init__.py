"""Prefect, and nothing else: the stages of dvc.yaml as tasks, the retraining chain, deployments."""
