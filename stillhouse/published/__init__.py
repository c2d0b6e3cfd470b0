"""What is published of models, data sets and hardware, and what follows from it before anything is downloaded."""
