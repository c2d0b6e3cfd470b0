"""Cache to student: loader, losses, models, stages, and the torchrun entry main.py."""
