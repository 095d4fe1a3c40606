"""Questions about long texts, with known answers, made by seed at any length."""
