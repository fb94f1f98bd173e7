"""What `python -m experiments.speed` can measure, one module each."""
