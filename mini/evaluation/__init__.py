"""How good the small model is: its report, and what fine-tuning adds."""
