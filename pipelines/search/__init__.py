"""Search of hyperparameters: many trainings, cut off early, of which the best goes on."""
