"""What is promised: accounting, noise, ledger, budget, mechanisms, secure sums."""
