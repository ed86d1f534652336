"""What a model can do: tasks, the samples that it answers with, and the rules that grade them."""
