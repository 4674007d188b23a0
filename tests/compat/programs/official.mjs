// The official JavaScript client: whole and streamed, with log-probabilities. Writes what it got as JSON.
import OpenAI from "openai";

const model = process.argv[2];
const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "none", maxRetries: 0 });
const plain = { model, messages: [{ role: "user", content: "Hé?" }], max_tokens: 8, temperature: 0 };

const whole = await client.chat.completions.create({ ...plain, logprobs: true, top_logprobs: 2 });
let streamed = "";
const stream = await client.chat.completions.create({ ...plain, stream: true, stream_options: { include_usage: true } });
let usage = null;
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const completion = await client.completions.create({ model, prompt: "Hé?", max_tokens: 0, echo: true, logprobs: 1 });
let refused = null;
try {
  await client.chat.completions.create({ ...plain, temperature: 3 });
} catch (error) {
  refused = { kind: error.constructor.name, param: error.param };
}
const models = [];
for await (const entry of client.models.list()) models.push(entry.id);
console.log(
  JSON.stringify({
    models,
    whole: whole.choices[0].message.content,
    logprobs: whole.choices[0].logprobs.content.map((entry) => entry.logprob),
    streamed,
    usage: usage.completion_tokens,
    echoed: completion.choices[0].text,
    refused,
  }),
);
