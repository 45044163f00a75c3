"""Token loss, the Trainer, metrics, the run's folder."""
