"""The trainer on one rank: Megatron's model, optimizer, batches, log-probs and routing replay."""
