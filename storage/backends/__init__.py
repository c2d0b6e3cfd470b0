"""File access for caches: local folders, object stores, locks and full disks. Uses processes."""
