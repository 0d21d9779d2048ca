"""The questions of the night-train task: families of one SQL shape and many wordings.

A family has its SQL with slots, six wordings to train on, one to validate, two to test.
`rule` names the house rule that the SQL rests on and that no prompt states.

Slots: {t} train, {c} home city, {r} rider, {k} trip number, {n} a number, {p} a price,
{f} a dish, {m} a month in words and {m_iso} as in the database, {d} and {d_iso} a day.
"""

from typing import NamedTuple

HOUSE_RULES = {
    "late": "a trip is late when it arrives more than 15 minutes behind time: late>15",
    "punctual": "a trip is punctual up to 5 minutes: late<=5",
    "cancelled": "state 3 is a cancelled trip",
    "cut short": "state 2 is a trip that ended before its terminus",
    "cabin": "bed 1 is a cabin",
    "couchette": "bed 2 is a couchette",
    "long haul": "a train is long haul above 1000 km",
    "staff": "staff ride without a price: price IS NULL",
    "regular": "a regular is a rider with at least 3 tickets",
    "takings": "cancelled trips are refunded, so takings leave out state 3",
    "timetable year": "timetable year 2025 begins on 15 December 2024",
}


class Family(NamedTuple):
    name: str
    sql: str
    rule: str | None
    train: list[str]
    validation: list[str]
    test: list[str]
    ordered: bool = False


FAMILIES = [
    Family(
        "trips_of_train",
        "SELECT COUNT(*) FROM trip WHERE train='{t}'",
        None,
        [
            "How many trips has the {t} made?",
            "Count the trips of the {t}.",
            "Number of trips for the {t}?",
            "How often is the {t} in the log?",
            "Give the trip count of the {t}.",
            "The {t}: how many trips in all?",
        ],
        ["What is the total of trips by the {t}?"],
        [
            "How many journeys are there for the {t}?",
            "Tell me the number of runs of the {t}.",
        ],
    ),
    Family(
        "late_trips_of_train",
        "SELECT COUNT(*) FROM trip WHERE train='{t}' AND late>15",
        "late",
        [
            "How many trips of the {t} were late?",
            "How often was the {t} late?",
            "Count the late trips of the {t}.",
            "Number of late arrivals of the {t}?",
            "The {t}: how many trips came in late?",
            "How many times did the {t} arrive late?",
        ],
        ["On how many trips was the {t} running late?"],
        [
            "How many late journeys has the {t} had?",
            "Give the count of times the {t} was late.",
        ],
    ),
    Family(
        "punctual_trips_of_train",
        "SELECT COUNT(*) FROM trip WHERE train='{t}' AND late<=5",
        "punctual",
        [
            "How many trips of the {t} were punctual?",
            "How often was the {t} punctual?",
            "Count the punctual trips of the {t}.",
            "Number of punctual arrivals of the {t}?",
            "The {t}: how many trips were on time?",
            "How many times did the {t} arrive on time?",
        ],
        ["On how many trips was the {t} on time?"],
        [
            "How many punctual journeys has the {t} had?",
            "Give the count of times the {t} was punctual.",
        ],
    ),
    Family(
        "cancelled_in_month",
        "SELECT COUNT(*) FROM trip WHERE state=3 AND day LIKE '{m_iso}%'",
        "cancelled",
        [
            "How many trips were cancelled in {m}?",
            "Count the cancelled trips of {m}.",
            "Number of cancellations in {m}?",
            "In {m}, how many trips were cancelled?",
            "How many cancelled trips does {m} have?",
            "{m}: how many cancellations?",
        ],
        ["How often was a trip cancelled in {m}?"],
        [
            "How many journeys got cancelled during {m}?",
            "Tell me the number of cancelled trips for {m}.",
        ],
    ),
    Family(
        "days_cut_short",
        "SELECT day FROM trip WHERE train='{t}' AND state=2",
        "cut short",
        [
            "On which days was the {t} cut short?",
            "When was the {t} cut short?",
            "List the days on which the {t} was cut short.",
            "Which days saw the {t} cut short?",
            "Give the dates when the {t} was cut short.",
            "The {t} was cut short on which days?",
        ],
        ["Days when a trip of the {t} was cut short?"],
        [
            "Show me every date the {t} got cut short.",
            "What days did the {t} end up cut short?",
        ],
    ),
    Family(
        "longest_delay",
        "SELECT MAX(late) FROM trip WHERE train='{t}'",
        None,
        [
            "What was the longest delay of the {t}?",
            "Give the worst delay of the {t}.",
            "By how many minutes was the {t} late at most?",
            "The {t}: its longest delay?",
            "What is the greatest delay of the {t}?",
            "Maximum delay of the {t}?",
        ],
        ["How long was the longest delay of the {t}?"],
        [
            "What is the worst delay the {t} ever had?",
            "Tell me the biggest delay of the {t}.",
        ],
    ),
    Family(
        "average_delay_in_month",
        "SELECT AVG(late) FROM trip WHERE day LIKE '{m_iso}%'",
        None,
        [
            "What was the average delay in {m}?",
            "Average delay for {m}?",
            "Give the mean delay in {m}.",
            "In {m}, what was the average delay?",
            "How many minutes was the mean delay of {m}?",
            "{m}: average delay?",
        ],
        ["What is the mean delay over {m}?"],
        [
            "On average, how big was the delay in {m}?",
            "Tell me the average delay during {m}.",
        ],
    ),
    Family(
        "trains_on_day",
        "SELECT train FROM trip WHERE day='{d_iso}'",
        None,
        [
            "Which trains left on {d}?",
            "List the trains of {d}.",
            "What trains ran on {d}?",
            "On {d}, which trains left?",
            "Trains on {d}?",
            "Show the trains that departed on {d}.",
        ],
        ["Which trains were out on {d}?"],
        ["Name the trains that ran on {d}.", "What trains departed on {d}?"],
    ),
    Family(
        "trips_per_train_in_month",
        "SELECT train, COUNT(*) FROM trip WHERE day LIKE '{m_iso}%' GROUP BY train",
        None,
        [
            "How many trips did each train make in {m}?",
            "Count the trips per train in {m}.",
            "Trips by train for {m}?",
            "In {m}, how many trips per train?",
            "Give each train's number of trips in {m}.",
            "{m}: trips of every train?",
        ],
        ["For each train, how many trips in {m}?"],
        [
            "Break down the trips of {m} by train.",
            "Per train, what is the number of trips in {m}?",
        ],
    ),
    Family(
        "worst_days",
        "SELECT day FROM trip WHERE train='{t}' ORDER BY late DESC LIMIT {n}",
        None,
        [
            "On which {n} days was the {t} most delayed?",
            "Give the {n} worst days of the {t}.",
            "The {n} most delayed days of the {t}?",
            "List the {n} days with the longest delays of the {t}.",
            "Top {n} days by delay for the {t}?",
            "Which {n} days were the worst of the {t}?",
        ],
        ["The {t}: its {n} worst days?"],
        [
            "Show the {n} most delayed days for the {t}.",
            "What were the {n} worst days the {t} had?",
        ],
        ordered=True,
    ),
    Family(
        "no_delay_recorded",
        "SELECT trip FROM trip WHERE train='{t}' AND late IS NULL",
        None,
        [
            "Which trips of the {t} have no delay recorded?",
            "List trips of the {t} without a recorded delay.",
            "For which trips of the {t} is the delay missing?",
            "Trips of the {t} where no delay was noted?",
            "Show the trips of the {t} with no delay on record.",
            "Where is the delay of the {t} not recorded?",
        ],
        ["Which trips of the {t} lack a recorded delay?"],
        [
            "What trips of the {t} have a missing delay?",
            "Find trips of the {t} with no recorded delay.",
        ],
    ),
    Family(
        "trains_from_city",
        "SELECT train FROM train WHERE home='{c}'",
        None,
        [
            "Which trains are at home in {c}?",
            "List the trains based in {c}.",
            "What trains have their home in {c}?",
            "Trains from {c}?",
            "Name the trains of {c}.",
            "Which trains belong to {c}?",
        ],
        ["Show the trains whose home is {c}."],
        ["Which trains have {c} as their home?", "What are the trains from {c}?"],
    ),
    Family(
        "trains_longer_than",
        "SELECT train FROM train WHERE km>{n}",
        None,
        [
            "Which trains run more than {n} km?",
            "List the trains that go over {n} km.",
            "Trains with a route above {n} km?",
            "What trains travel more than {n} km?",
            "Name the trains whose route exceeds {n} km.",
            "Show trains going further than {n} km.",
        ],
        ["Which trains cover more than {n} km?"],
        ["What trains go beyond {n} km?", "Find the trains that run over {n} km."],
    ),
    Family(
        "long_haul_from_city",
        "SELECT train FROM train WHERE home='{c}' AND km>1000",
        "long haul",
        [
            "Which long-haul trains are at home in {c}?",
            "List the long-haul trains based in {c}.",
            "What long-haul trains have their home in {c}?",
            "Long-haul trains from {c}?",
            "Name the long-haul trains of {c}.",
            "Which long-haul trains belong to {c}?",
        ],
        ["Show the long-haul trains whose home is {c}."],
        [
            "Which long-haul trains have {c} as their home?",
            "What are the long-haul trains from {c}?",
        ],
    ),
    Family(
        "paid_by_rider",
        "SELECT SUM(price) FROM ticket WHERE rider='{r}'",
        None,
        [
            "How much has {r} paid?",
            "What did {r} pay in all?",
            "Total paid by {r}?",
            "Sum of the prices {r} paid?",
            "How much money did {r} spend?",
            "Give the total that {r} spent.",
        ],
        ["What is the sum {r} has paid?"],
        ["How much did {r} spend in total?", "Tell me what {r} paid altogether."],
    ),
    Family(
        "cabins_on_trip",
        "SELECT COUNT(*) FROM ticket WHERE trip={k} AND bed=1",
        "cabin",
        [
            "How many cabins were sold on trip {k}?",
            "Count the cabins of trip {k}.",
            "Number of cabin tickets on trip {k}?",
            "Trip {k}: how many cabins?",
            "How many riders had a cabin on trip {k}?",
            "Give the number of cabins sold for trip {k}.",
        ],
        ["On trip {k}, how many cabins were sold?"],
        [
            "How many people took a cabin on trip {k}?",
            "Tell me the count of cabin tickets for trip {k}.",
        ],
    ),
    Family(
        "couchette_riders_on_trip",
        "SELECT rider FROM ticket WHERE trip={k} AND bed=2",
        "couchette",
        [
            "Who had a couchette on trip {k}?",
            "List the couchette riders of trip {k}.",
            "Which riders lay in a couchette on trip {k}?",
            "Trip {k}: who was in a couchette?",
            "Name the riders with a couchette on trip {k}.",
            "Who slept in a couchette on trip {k}?",
        ],
        ["On trip {k}, who had a couchette?"],
        [
            "Which people took a couchette on trip {k}?",
            "Show who booked a couchette for trip {k}.",
        ],
    ),
    Family(
        "staff_on_trip",
        "SELECT rider FROM ticket WHERE trip={k} AND price IS NULL",
        "staff",
        [
            "Which staff rode on trip {k}?",
            "Who was staff on trip {k}?",
            "List the staff of trip {k}.",
            "Trip {k}: who rode as staff?",
            "Name the staff on trip {k}.",
            "Which riders were staff on trip {k}?",
        ],
        ["On trip {k}, who was staff?"],
        ["Who travelled as staff on trip {k}?", "Show the staff aboard trip {k}."],
    ),
    Family(
        "dishes_on_trip",
        "SELECT COUNT(*) FROM ticket WHERE trip={k} AND meal='{f}'",
        None,
        [
            "How many had {f} on trip {k}?",
            "Count the orders of {f} on trip {k}.",
            "Trip {k}: how many orders of {f}?",
            "How often was {f} served on trip {k}?",
            "Number of riders with {f} on trip {k}?",
            "How many riders ate {f} on trip {k}?",
        ],
        ["On trip {k}, how many took {f}?"],
        [
            "How many people ordered {f} on trip {k}?",
            "Tell me the count of {f} on trip {k}.",
        ],
    ),
    Family(
        "regulars_above_price",
        "SELECT rider FROM ticket WHERE price>{p} GROUP BY rider HAVING COUNT(*)>=3",
        "regular",
        [
            "Who is a regular at prices above {p}?",
            "Which riders are regulars at over {p} euros?",
            "List the regulars paying more than {p} euros.",
            "Regulars among tickets above {p} euros?",
            "Name the regulars who pay over {p} euros.",
            "Who are the regulars above {p} euros?",
        ],
        ["Which regulars pay more than {p} euros?"],
        [
            "Show the regulars with tickets over {p} euros.",
            "What riders are regulars above {p} euros?",
        ],
    ),
    Family(
        "riders_of_train_on_day",
        "SELECT rider FROM ticket JOIN trip USING(trip)"
        " WHERE train='{t}' AND day='{d_iso}'",
        None,
        [
            "Who rode the {t} on {d}?",
            "List the riders of the {t} on {d}.",
            "Which riders were on the {t} on {d}?",
            "Riders on the {t} of {d}?",
            "Name everyone on the {t} on {d}.",
            "On {d}, who was on the {t}?",
        ],
        ["Who was aboard the {t} on {d}?"],
        ["Who travelled with the {t} on {d}?", "Show the people on the {t} on {d}."],
    ),
    Family(
        "takings_of_train",
        "SELECT SUM(price) FROM ticket JOIN trip USING(trip)"
        " WHERE train='{t}' AND state<3",
        "takings",
        [
            "What were the takings of the {t}?",
            "How high are the takings of the {t}?",
            "Give the takings of the {t}.",
            "The {t}: total takings?",
            "Takings of the {t}?",
            "How much are the takings of the {t} in all?",
        ],
        ["What are the total takings of the {t}?"],
        [
            "How much did the {t} bring in as takings?",
            "Tell me the takings for the {t}.",
        ],
    ),
    Family(
        "late_trips_from_city",
        "SELECT COUNT(*) FROM trip JOIN train USING(train)"
        " WHERE home='{c}' AND late>15",
        "late",
        [
            "How many trips of trains from {c} were late?",
            "How often was a train from {c} late?",
            "Count the late trips of trains from {c}.",
            "Number of late arrivals of trains from {c}?",
            "Trains from {c}: how many trips came in late?",
            "How many times did a train from {c} arrive late?",
        ],
        ["On how many trips was a train from {c} running late?"],
        [
            "How many late journeys have trains from {c} had?",
            "Give the count of times trains from {c} were late.",
        ],
    ),
    Family(
        "cabin_riders_from_city",
        "SELECT DISTINCT rider FROM ticket JOIN trip USING(trip) JOIN train"
        " USING(train) WHERE home='{c}' AND bed=1",
        "cabin",
        [
            "Who had a cabin on a train from {c}?",
            "List the cabin riders of trains from {c}.",
            "Which riders took a cabin on trains from {c}?",
            "Trains from {c}: who was in a cabin?",
            "Name the riders with a cabin on a train from {c}.",
            "Who slept in a cabin on a train from {c}?",
        ],
        ["On trains from {c}, who had a cabin?"],
        [
            "Which people booked a cabin on a train from {c}?",
            "Show who was in a cabin on trains from {c}.",
        ],
    ),
    Family(
        "trains_of_city_by_length",
        "SELECT train FROM train WHERE home='{c}' ORDER BY km DESC",
        None,
        [
            "Trains from {c}, longest route first?",
            "List the trains of {c} by length, longest first.",
            "Order the trains from {c} by km, longest first.",
            "Sort the trains of {c} from longest to shortest.",
            "Rank the trains based in {c} by km.",
            "Which trains are from {c}, the longest first?",
        ],
        ["Rank the trains of {c} from longest to shortest."],
        [
            "Show the trains from {c} starting with the longest.",
            "Trains at home in {c}, ranked by km?",
        ],
        ordered=True,
    ),
    Family(
        "trips_in_timetable_2025",
        "SELECT COUNT(*) FROM trip WHERE train='{t}' AND day>='2024-12-15'",
        "timetable year",
        [
            "How many trips of the {t} in timetable year 2025?",
            "Count the {t} trips of timetable year 2025.",
            "Timetable year 2025: how many trips of the {t}?",
            "How often did the {t} run in timetable year 2025?",
            "Number of trips in timetable year 2025 for the {t}?",
            "In timetable year 2025, how many trips of the {t}?",
        ],
        ["How many times is the {t} in timetable year 2025?"],
        [
            "For timetable year 2025, count the trips of the {t}.",
            "How many journeys had the {t} in timetable year 2025?",
        ],
    ),
]

# Parts that training has seen, put together as it has never seen them.
COMPOSITIONS = [
    Family(
        "cancelled_of_train",
        "SELECT COUNT(*) FROM trip WHERE train='{t}' AND state=3",
        "cancelled",
        [],
        [],
        [
            "How many trips of the {t} were cancelled?",
            "Count the cancelled trips of the {t}.",
        ],
    ),
    Family(
        "late_in_month",
        "SELECT COUNT(*) FROM trip WHERE late>15 AND day LIKE '{m_iso}%'",
        "late",
        [],
        [],
        ["How many trips were late in {m}?", "Count the late trips of {m}."],
    ),
    Family(
        "longest_delay_in_month",
        "SELECT MAX(late) FROM trip WHERE day LIKE '{m_iso}%'",
        None,
        [],
        [],
        ["What was the longest delay in {m}?", "Maximum delay for {m}?"],
    ),
    Family(
        "cabin_riders_on_trip",
        "SELECT rider FROM ticket WHERE trip={k} AND bed=1",
        "cabin",
        [],
        [],
        ["Who had a cabin on trip {k}?", "List the cabin riders of trip {k}."],
    ),
    Family(
        "couchettes_on_trip",
        "SELECT COUNT(*) FROM ticket WHERE trip={k} AND bed=2",
        "couchette",
        [],
        [],
        [
            "How many couchettes were sold on trip {k}?",
            "Count the couchettes of trip {k}.",
        ],
    ),
    Family(
        "days_cancelled",
        "SELECT day FROM trip WHERE train='{t}' AND state=3",
        "cancelled",
        [],
        [],
        ["On which days was the {t} cancelled?", "When was the {t} cancelled?"],
    ),
    Family(
        "staff_of_train_on_day",
        "SELECT rider FROM ticket JOIN trip USING(trip)"
        " WHERE train='{t}' AND day='{d_iso}' AND price IS NULL",
        "staff",
        [],
        [],
        ["Who was staff on the {t} on {d}?", "List the staff of the {t} on {d}."],
    ),
    Family(
        "punctual_from_city",
        "SELECT COUNT(*) FROM trip JOIN train USING(train)"
        " WHERE home='{c}' AND late<=5",
        "punctual",
        [],
        [],
        [
            "How many trips of trains from {c} were punctual?",
            "Count the punctual trips of trains from {c}.",
        ],
    ),
    Family(
        "average_delay_of_train",
        "SELECT AVG(late) FROM trip WHERE train='{t}'",
        None,
        [],
        [],
        ["What was the average delay of the {t}?", "Give the mean delay of the {t}."],
    ),
    Family(
        "dish_riders_on_trip",
        "SELECT rider FROM ticket WHERE trip={k} AND meal='{f}'",
        None,
        [],
        [],
        ["Who had {f} on trip {k}?", "Which riders ate {f} on trip {k}?"],
    ),
]
