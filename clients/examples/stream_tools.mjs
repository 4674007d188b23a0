// The official JavaScript client: streams an answer that calls a tool, runs the calls, streams the answer to their results.
//
//     npm install openai
//     BASE_URL=http://127.0.0.1:8000/v1 node stream_tools.mjs "What is the weather in Oslo?"
//
// Small models that were never trained on tools hardly call them by themselves: this forces the first answer to be a call.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: process.env.API_KEY ?? "none" });
const model = process.env.MODEL ?? (await client.models.list()).data[0].id;
const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather in a city",
      strict: true,
      parameters: {
        type: "object",
        properties: { city: { enum: ["Oslo", "Paris", "Tokyo"] }, days: { type: "integer", minimum: 1, maximum: 7 } },
        required: ["city", "days"],
        additionalProperties: false,
      },
    },
  },
];
const weather = ({ city, days }) => `${city}: sunny for ${days} days`;

/** Streams one answer to standard output; returns it whole, as a message for the next request. */
async function answer(messages, options) {
  const stream = await client.chat.completions.create({ model, messages, tools, stream: true, ...options });
  const calls = [];
  let content = "";
  for await (const chunk of stream) {
    const delta = chunk.choices[0]?.delta ?? {};
    if (delta.content) {
      content += delta.content;
      process.stdout.write(delta.content);
    }
    for (const { index, id, function: part } of delta.tool_calls ?? []) {
      // A call begins with its id and name; then only its arguments grow.
      calls[index] ??= { id, type: "function", function: { name: part.name, arguments: "" } };
      calls[index].function.arguments += part.arguments ?? "";
      process.stdout.write(id ? `\n[${part.name} ` : (part.arguments ?? ""));
    }
  }
  process.stdout.write("\n");
  return calls.length ? { role: "assistant", content, tool_calls: calls } : { role: "assistant", content };
}

const messages = [{ role: "user", content: process.argv[2] ?? "What is the weather in Oslo?" }];
const limit = Number(process.env.MAX_TOKENS ?? 64);
const first = await answer(messages, { tool_choice: "required", parallel_tool_calls: false, temperature: 0 });
const results = first.tool_calls.map((call) => ({
  role: "tool",
  tool_call_id: call.id,
  content: weather(JSON.parse(call.function.arguments)),
}));
messages.push(first, ...results);
for (const result of results) process.stdout.write(`-> ${result.content}\n`);
await answer(messages, { tool_choice: "none", temperature: 0, max_tokens: limit });
