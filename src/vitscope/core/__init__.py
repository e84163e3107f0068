"""The probe, the objective and the passes over a model that every measure shares."""
