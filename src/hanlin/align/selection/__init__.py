"""Which of many conversations are worth training on: one small file a method; each says of every one why."""
