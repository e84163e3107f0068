"""The paper's claims: their statistics and verdicts."""
