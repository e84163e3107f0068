"""Values of a map, or of a layer's attention, that several measures of one pass need: computed once for all of them."""
