"""The published layouts of a subject encoder: each module has one layout's keys and reads its configuration."""
