"""What was read and what it was worth: the account that `Session.explain` gives."""
