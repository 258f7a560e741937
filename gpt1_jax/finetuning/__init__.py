"""What a pre-trained model is put to: the paper's tasks, text to text, conversations."""
