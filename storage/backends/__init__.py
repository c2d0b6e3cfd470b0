"""Folders and object stores, locks on them, full disks: every byte that a cache reads or writes. Uses processes."""
