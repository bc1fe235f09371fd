"""Fine-tuning on one subject: the loop, LoRA, validation, the loss curve."""
