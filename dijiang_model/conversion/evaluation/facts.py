"""Facts that evaluation tells and asks for: other kinds, wordings, names and values than calibration's."""

from dijiang_model.conversion.calibration.facts import FactKind, digits, one_of

KINDS = (
    FactKind(
        ("Remember that the ticket number for {subject} is {value}.", "The {subject} ticket has the number {value}."),
        ("What is the ticket number for {subject}?", "Tell me the number of the {subject} ticket."),
        ("The ticket number for {subject} is ",),
        one_of("Vienna", "Geneva", "Madrid", "Warsaw", "Athens", "Cairo", "Boston", "Seoul"),
        digits(5),
    ),
    FactKind(
        ("{subject} works as a {value}.", "In case you wonder, {subject} is a {value} by profession."),
        ("What is the profession of {subject}?", "What does {subject} do for a living?"),
        ("{subject} is a ", "{subject} works as a "),
        one_of("Alma", "Boris", "Clara", "Dmitri", "Edith", "Felix", "Greta", "Hugo"),
        one_of(
            "plumber", "surgeon", "violinist", "baker", "pilot", "lawyer", "gardener", "chemist", "tailor", "judge",
        ),
    ),
    FactKind(
        ("The favourite {subject} of my wife is {value}.", "My wife's favourite {subject} is {value}."),
        ("What is my wife's favourite {subject}?", "Which {subject} does my wife like best?"),
        ("Your wife's favourite {subject} is ",),
        one_of("flower", "colour", "fruit", "drink", "dish", "season"),
        one_of("lavender", "turquoise", "apricot", "lemonade", "risotto", "autumn", "saffron", "cherry"),
    ),
    FactKind(
        ("The {subject} is parked {value}.", "I left the {subject} {value}."),
        ("Where is the {subject} parked?", "Where did I leave the {subject}?"),
        ("The {subject} is parked ", "You left the {subject} "),
        one_of("van", "motorbike", "trailer", "caravan", "scooter", "jeep"),
        one_of(
            "behind the bakery", "near the old mill", "at the harbour", "opposite the museum", "outside the stadium",
            "by the lighthouse",
        ),
    ),
    FactKind(
        ("The train to {subject} leaves at {value}.", "Departure for {subject} is at {value}."),
        ("When does the train to {subject} leave?", "At what time does the train to {subject} depart?"),
        ("The train to {subject} leaves at ",),
        one_of("Leeds", "Ghent", "Turin", "Bergen", "Krakow", "Seville"),
        lambda rng: f"{rng.randint(6, 22)}:{rng.choice(('05', '15', '20', '35', '40', '50'))}",
    ),
    FactKind(
        ("Our team is named {value} for the {subject}.", "For the {subject} our team has the name {value}."),
        ("What is our team's name for the {subject}?",),
        ("Our team's name for the {subject} is ", "Your team is named "),
        one_of("quiz", "regatta", "marathon", "tournament", "relay"),
        one_of("Silver Foxes", "Night Owls", "Red Kites", "Iron Bears", "Blue Herons", "Wild Geese"),
    ),
)  # fmt: skip
