"""Reproduction of the paper's figures and tables: plan, trials and drawing."""
