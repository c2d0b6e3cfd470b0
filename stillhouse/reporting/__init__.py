"""What an experiment measured, as report.json, a page and the terminal's last lines. Uses the ledger and storage."""
