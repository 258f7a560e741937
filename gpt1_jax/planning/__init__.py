"""What a step needs and how long it takes on devices that are not there, from the program compiled for them."""
