"""What a trained model is worth: tasks on local files, likelihoods, and what they are measured with."""
