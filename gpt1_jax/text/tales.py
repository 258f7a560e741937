"""The words of the tales: the grammar of the source ``stories``, in the notation of :mod:`gpt1_jax.text.stories`.

A tale: a hero with a wish sets out with something to eat, meets an obstacle and a helper, shares, finds, comes home.
Names, things and places come back, so to know the next word is to have listened. ``he``, ``him`` and ``his`` are the
hero's, ``their`` is the helper's.
"""

RULES = """
tale
1 | <opening> <trait> <kind> who lived <home>. <plot> <ending>

opening
4 | Once upon a time there was
3 | Once there was
2 | There once was / Long ago there was
1 | My grandmother knew / Everyone has heard of

trait
3 | a [brave] / a [curious] / a [kind] / a [cheerful] | trait=*
2 | a [quiet] / a [clever] / a [stubborn] / an [honest] | trait=*
1 | a [lazy] / an [untidy] / a [shy] / a [proud] | trait=*

kind
5 | girl named <girl> | kind=girl
5 | boy named <boy> | kind=boy
2 | mouse named <pet> | kind=mouse
2 | fox named <pet> | kind=fox
2 | rabbit named <pet> | kind=rabbit
1 | mole named <pet> | kind=mole
1 | piglet named <pet> | kind=piglet

girl
4 | Anna / Mia / Lucy / Emma / Clara / Rosa | hero=*, he=she, him=her, his=her
2 | Greta / Hannah / Ida / Julia / Nora / Olga / Paula / Sara | hero=*, he=she, him=her, his=her
1 | Vera / Wilma / Tilda / Frida / Dora / Agnes | hero=*, he=she, him=her, his=her

boy
4 | Tom / Ben / Max / Peter / Oliver / Jack | hero=*, he=he, him=him, his=his
2 | Anton / David / Emil / Felix / Hugo / Ivan / Karl / Leo | hero=*, he=he, him=him, his=his
1 | Martin / Oscar / Simon / Victor / Walter / Noah | hero=*, he=he, him=him, his=his

pet
3 | Pip / Nibble / Hazel / Clover | hero=*, he=she, him=her, his=her
2 | Daisy / Poppy / Tansy / Willow | hero=*, he=she, him=her, his=her
3 | Scamper / Button / Thistle / Rusty | hero=*, he=he, him=him, his=his
2 | Bramble / Patch / Whisk / Fidget | hero=*, he=he, him=him, his=his

home
4 | in a small [house] / in a [cottage] | home=*
3 | on a [farm] / in a [windmill] / in a hollow [tree] | home=*
2 | in an old [tower] / on a [boat] / in a [tent] / above a [bakery] | home=*
1 | in a [castle] / in a [lighthouse] | home=*

plot
3 | One <day> {his} <kin> lost <colour> <thing>, and {hero} <promised> to find it. <journey> {hero} took it home to the
  {home}, and {his} {kin} <rejoiced>.
2 | Every <night> {he} dreamed of <colour> <thing>. "I will find it," {he} <said>. <journey> {hero} <touched> it, and
  it was real.
2 | When {his} <kin> fell ill, only <colour> <herb> could help. <journey> {hero} carried it home to the
  {home}, and {his} {kin} was well again <by>.

day
2 | day / morning / evening
1 | Sunday / summer / winter

night
3 | night
1 | summer / winter / spring / autumn

kin
3 | mother / father / grandmother / grandfather | kin=*
2 | sister / brother / aunt / uncle | kin=*

colour
3 | a [red] / a [blue] / a [green] / a [golden] / a [silver] | colour=*
2 | a [white] / a [black] / a [yellow] / a [tiny] | colour=*
1 | an [orange] / a [purple] / an [ancient] | colour=*

thing
3 | ring / key / kite / bell / hat / ball | thing=*
2 | drum / cup / lamp / spoon / coin / mirror / whistle / feather | thing=*
1 | violin / clock / umbrella / compass / ribbon / trumpet | thing=*

herb
3 | flower / berry / apple / leaf | thing=*
2 | mushroom / root / rose / plum | thing=*

promised
2 | promised / wanted
1 | decided / hoped

said
3 | said
1 | whispered / sang / told the moon / told everyone

journey
1 | <when> {he} put <food> into {his} <bag> and <went> <path>. <soon> {he} came to <obstacle>, <hidden>, lay the
  {colour} {thing}.

when
5 | On a <weather> <daytime>
3 | The next day
2 | Before sunrise
1 | At midnight / That very hour

weather
3 | sunny / windy / warm / cold
1 | rainy / misty / snowy

daytime
3 | morning
1 | afternoon / evening

food
3 | some [bread] / some [cheese] / a piece of [cake] / a pot of [honey] | food=*
2 | a jar of [jam] / a bag of [nuts] / some [cherries] / a bowl of [soup] / an apple [pie] | food=*
1 | some [raisins] / a leg of [ham] / an onion [tart] | food=*

bag
3 | basket / bag / pocket
1 | sack / hat / suitcase

went
3 | walked / set off
2 | ran / wandered
1 | marched / tiptoed

path
3 | over the hills / along the road / through the fields
2 | across the meadow / down the valley / past the mill
1 | into the mist / towards the sea / through the village

soon
3 | Soon / Before long
2 | An hour later / In the end
1 | After <number> <steps>

number
3 | two / three
2 | four / five / seven
1 | nine / ten / twelve

steps
2 | days / miles
1 | weeks

obstacle
3 | the bank of a <water> too <wet> to cross. <meeting> <water_help>. On the other side
3 | the foot of a <rise> too <tall> to climb. <meeting> <rise_help>. On the other side
2 | a closed <gate> too <stiff> to open. <meeting> <gate_help>. Behind the {barrier}
2 | the edge of a <dark> too <grim> to enter alone. <meeting> <dark_help>. Deep inside the {barrier}

water
3 | river / stream | barrier=*
1 | canal / creek | barrier=*

wet
3 | wide / deep | too=*
1 | cold / wild | too=*

rise
3 | wall / cliff | barrier=*
1 | hedge / rock | barrier=*

tall
3 | high / steep | too=*
1 | slippery / smooth | too=*

gate
3 | gate / door | barrier=*
1 | drawbridge / trapdoor | barrier=*

stiff
3 | heavy / rusty | too=*
1 | stiff / old | too=*

dark
3 | forest / wood | barrier=*
1 | jungle / valley | barrier=*

grim
3 | dark / gloomy | too=*
1 | noisy / strange | too=*

meeting
1 | <where> sat <mood> <beast> called <friend>. <question> <answer> {hero} <gave> {friend} the {food}, and the {mood}
  {beast}

where
3 | Nearby / Under a tree / On a stone
2 | In the grass / Behind a bush / On a log
1 | In the shade / On a wheelbarrow / Under a big leaf

mood
3 | a [friendly] / an [old] / a [lonely] / a [hungry] | mood=*
2 | a [wise] / a [tired] / a [grumpy] / a [polite] | mood=*
1 | an [absent-minded] / a [fat] / a [ragged] | mood=*

beast
3 | goat / owl / badger / frog | beast=*
2 | bear / goose / donkey / squirrel / crow | beast=*
1 | tortoise / hedgehog / heron / beaver | beast=*

friend
3 | Bruno / Barnaby / Otto / Rufus | friend=*, their=his
2 | Albert / Caspar / Gustav / Magnus / Ulysses | friend=*, their=his
3 | Bertha / Matilda / Sophie / Ursula | friend=*, their=her
2 | Amelia / Cordula / Edith / Henrietta / Zelda | friend=*, their=her

question
3 | "Why so <sad>, {hero}?" <asked> the {beast}.
2 | "Where to, little {kind}?" <asked> {friend}.
2 | "What is the matter?" <asked> {friend}.
1 | "Good day, {trait} {kind}," said the {beast}.

sad
2 | sad / worried
1 | cross / pale

asked
3 | asked
1 | cried / called / croaked

answer
3 | "I must find <which> {colour} {thing}," <replied> {hero}.
2 | "The {barrier} is too {too}," <replied> {hero}.
1 | "I need help," <replied> {hero}.

which
3 | the
1 | that

replied
3 | said / answered
1 | sighed / sobbed

gave
3 | gave / offered
1 | handed / passed

water_help
3 | carried {him} across on {their} back / showed {him} a row of stones
2 | pulled a boat out of the reeds / knew of a secret bridge
1 | drank the whole {barrier} in one gulp / asked two swans to carry {him}

rise_help
3 | showed {him} a hidden stair / threw down a rope
2 | lifted {him} up on {their} shoulders / fetched a long ladder
1 | dug a tunnel under the {barrier} / asked an eagle to carry {him}

gate_help
3 | found the key under a stone / pushed with all {their} strength
2 | knew the secret word / knocked three times
1 | picked the lock with a pin / asked the mice to gnaw a hole

dark_help
3 | lit a lantern and went first / held {his} hand
2 | gave {him} a jar of fireflies / sang a song against fear
1 | asked the moon to shine / tied a long thread to {his} coat

hidden
3 | under a stone / in the moss / in a box
2 | in an empty nest / among old roots / on a velvet cushion
1 | in a broken pot / beneath a waterfall / between two candles

rejoiced
3 | laughed with joy / danced / hugged {him}
2 | wept with joy / baked a cake / rang every bell
1 | could not believe it / fainted

touched
3 | touched / held
2 | kissed / polished
1 | hugged / wept over

by
3 | by evening / the next morning
1 | within an hour / before Sunday

ending
3 | Ever after, {hero} and {friend} <did> every <weekday>. <end>
2 | {hero} never forgot {friend} the {beast}. <end>
2 | {friend} still tells the other <beasts> of the {trait} {kind}. <end>
1 | Ever since, there has been {food} for {friend} on every <weekday>. <end>

did
3 | played chess / had tea / went fishing
2 | sang songs / baked bread / climbed trees
1 | read books / looked at the stars / counted clouds

weekday
3 | Sunday / Saturday
1 | Monday / Tuesday / Wednesday / Thursday / Friday

beasts
2 | animals / beasts
1 | creatures

end
4 | The end.
2 | And that is all. / Good night.
1 | Sleep well.
"""
