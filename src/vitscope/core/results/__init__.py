"""Results of measures: their tables, their files and their texts."""
