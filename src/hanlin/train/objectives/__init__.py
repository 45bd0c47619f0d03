"""What is learnt in pretraining beside the next token (`train.objective.CausalLM`): one `Objective` a file."""
