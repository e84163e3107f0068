"""Protection of a measured model: checks of what comes in, and contexts that give the model back bit for bit."""
